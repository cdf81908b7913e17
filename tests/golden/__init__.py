"""Numbers from the papers' official codes, or from independent code where there is none, and their checker."""
