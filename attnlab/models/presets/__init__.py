"""The papers' models by name, one file a paper: sizes only, as ModelConfigs."""
