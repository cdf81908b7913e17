r"""The answer inside a text, and whether two answers are equal: as exact rationals, else as normalised text.

    extract   what stands in the last <answer>..</answer>, else in the last \boxed{..}, else after the last ####, else
              the last number, else all of the text
    normal    without $ % \text{} \left \right, thousands separators, units, the final period
    equal     1/2 = 0.5 = \frac{1}{2}; 50% = 50, not 0.5; where either is no number, the normalised texts

Nothing is evaluated, and no text makes these raise or take long.
"""

import re
from fractions import Fraction

MAX_LENGTH = 100_000  # characters of a text that are looked at, its last ones
MAX_ANSWER = 1000  # characters of an answer
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_FRACTION = r"\\[dt]?frac(?:\{\s*-?[0-9]+\s*\}\{\s*-?[0-9]+\s*\}|[0-9]{2})"
_NUMBER = re.compile(
    rf"(?<![0-9A-Za-z.)])-?(?:{_FRACTION})|(?:(?<![0-9A-Za-z)])-)?(?:{_UNSIGNED})(?:/[0-9]+)?"
)
_RATIONAL = re.compile(r"([+-]?)(?:([0-9]+\.?[0-9]*|\.[0-9]+)|([0-9]+)/([0-9]+))")
_UNIT = re.compile(
    r"(?P<number>[+-]?(?:\\frac\{[^{}]*\}\{[^{}]*\}|[0-9.,]+(?:/[0-9]+)?)) *"
    r"(?:\^\{?\\circ\}?|°|(?P<word>[A-Za-z]{2,}(?: [A-Za-z]+)*)(?:\^\{?[23]\}?)?)"
)
_NO_UNITS = frozenset(["pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "or", "and", "mod", "to"])


def extract(text: str) -> str:
    """The answer that a text gives."""
    text = text[-MAX_LENGTH:]
    if tags := _TAG.findall(text):
        return _boxed(tags[-1]) or tags[-1].strip()
    if boxed := _boxed(text):
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text.strip()


def gold(text: str) -> str:
    r"""The answer that a worked solution ends in: its last \boxed{..}, or what follows ####, else all of it."""
    if boxed := _boxed(text):
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    return text.strip()


def correct(text: str, answer: str) -> bool:
    """Whether a text gives the answer, or is the answer as it stands."""
    return equal(extract(text), answer) or equal(text, answer)


def equal(a: str, b: str) -> bool:
    """Whether two answers are the same number, or the same normalised text; empty ones equal nothing."""
    a, b = normal(a), normal(b)
    if not a or not b:
        return False
    x, y = rational(a), rational(b)
    return a == b if x is None or y is None else x == y


def normal(answer: str) -> str:
    """An answer without what does not change its meaning; "" for one too long to be an answer."""
    if len(answer) > MAX_ANSWER:
        return ""
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\\$|\\%|[$%]", "", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}", text)
    text = _without_text(text).strip().removesuffix(".").strip()
    if re.fullmatch(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?(?: .*)?", text):
        text = text.replace(",", "")
    unit = _UNIT.fullmatch(text)
    if unit and not _NO_UNITS & set((unit["word"] or "").split()):
        text = unit["number"].removesuffix(".")
    text = re.sub(r"\\frac\{\s*(-?[0-9]+)\s*\}\{\s*(-?[0-9]+)\s*\}", _plain_fraction, text)
    text = re.sub(r"\s+", "", text).removeprefix("--")
    return text.casefold() if len(text) > 1 and text.isalpha() else text


def rational(text: str) -> Fraction | None:
    """The number that a normalised answer is: an integer, decimal or a/b, of ASCII digits; None if it is none."""
    match = _RATIONAL.fullmatch(text) if len(text) <= 200 else None
    if match is None:
        return None
    sign, decimal, top, bottom = match.groups()
    if decimal is None and int(bottom) == 0:
        return None
    value = Fraction(int(top), int(bottom)) if decimal is None else Fraction(decimal)
    return -value if sign == "-" else value


def _plain_fraction(match: re.Match) -> str:
    """a/b with its sign in front, in brackets where the fraction is only a part of the answer."""
    top, bottom = match[1], match[2]
    sign = "-" if top.startswith("-") != bottom.startswith("-") else ""
    fraction = f"{sign}{top.removeprefix('-')}/{bottom.removeprefix('-')}"
    alone = (
        match.string[: match.start()].strip() in ("", "+", "-") and not match.string[match.end() :].strip()
    )
    return fraction if alone else f"({fraction})"


def _without_text(text: str) -> str:
    r"""Take \text{..} out, or its contents out of it where nothing else would be left."""
    wrapped = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}")
    bare = wrapped.sub("", text)
    return bare if bare.strip() else wrapped.sub(r"\1", text)


def _boxed(text: str) -> str:
    r"""The contents of the last \boxed{..} whose braces balance, "" if there is none."""
    if "\\boxed" not in text:
        return ""
    closing, still_open = {}, []
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            still_open.append(brace.start())
        elif still_open:
            closing[still_open.pop()] = brace.start()
    starts = [match.end() for match in re.finditer(r"\\boxed\s*(?=\{)", text)]
    balanced = [start for start in starts if start in closing]
    return text[balanced[-1] + 1 : closing[balanced[-1]]].strip() if balanced else ""
