"""How the VQA evaluation writes an answer before two answers are compared."""

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}

# Words whose misspellings the official list knows, by their ends.
_SPELLED = {
    "n't": (
        "ai are ca could did does do had has have is might must need ought sha should was were wo"
        " would"
    ),
    "n't've": "could had might should would",
    "'ve": "could I might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he I it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "I'm ma'am o'clock 'ow's'at 'twas y'all",
}


def _misspelled(word: str) -> list[str]:
    """The word without one of its apostrophes."""
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


# Three entries of the official list obey no rule, and one of them turns a word round. Its four
# words with a capital I are met by no answer, since answers are in lower case by then.
CONTRACTIONS = {
    wrong: stem + end
    for end, stems in _SPELLED.items()
    for stem in stems.split()
    for wrong in _misspelled(stem + end)
} | {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
}

# The official expression means to ask for a digit before the stop as well, but does not.
_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32  # the official code passes a flag where the number of replacements stands
_GROUPED = re.compile(r"\d,\d")


def normalise(text: str) -> str:
    """Write an answer as the VQA evaluation does.

    Line breaks and tabs become blanks. A mark that touches a blank somewhere goes, and so do all
    marks of an answer like `1,000`; any other becomes a blank. Apostrophes and colons are no marks.
    Full stops go unless a digit follows. Then come lower case, digits for `none` and `zero` to
    `ten`, no `a`, `an`, `the`, and missing apostrophes by the official list of contractions.

    Args:
        text: an answer of a person or of a network.

    Returns:
        Words with one blank between them; may be empty.

    Source: Antol et al. 2015, the published evaluation code with its quirks.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    words = _without_marks(text).lower().split()
    counted = [_DIGITS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in counted if word not in _ARTICLES)


def _without_marks(text: str) -> str:
    grouped = _GROUPED.search(text) is not None
    plain = text
    for mark in _MARKS:
        # Asked of the text as it came, so that the order of the marks does not matter.
        touches = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if grouped or touches else " ")
    return _STOP.sub("", plain, count=_MOST_STOPS)
