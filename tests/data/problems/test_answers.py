r"""Which answer a text gives, and which answers are equal."""

import time

import pytest

from attnlab.data.problems.answers import MAX_LENGTH, correct, equal, extract, gold, normal, rational


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>3</think><answer> 4 </answer> 5 \\boxed{6} #### 7", "4"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>\\boxed{1}</answer> or <answer>so \\boxed{12}</answer>", "12"),
        ("<answer>3 and \\boxed{4}, \\boxed{\\frac{1}{2}} #### 7 8", "\\frac{1}{2}"),
        ("\\boxed{a_{1}} and \\boxed{b", "a_{1}"),
        ("\\boxed {2}, {", "2"),
        ("3 #### 4 #### 1,234 \n", "1,234"),
        ("it is 3, or -4.5.", "-4.5"),
        ("12-5", "5"),
        ("x = -5", "-5"),
        ("2/3 of it", "2/3"),
        ("about \\frac{-1}{2}", "\\frac{-1}{2}"),
        ("1,234,567 people", "1,234,567"),
        ("Tuesday ", "Tuesday"),
        ("٣", "٣"),
        ("", ""),
    ],
)
def test_what_a_text_answers(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("36", "36.0"),
        ("+5", "5"),
        ("-0", "0"),
        ("007", "7"),
        (".5", "\\frac12"),
        ("1/2", "\\dfrac{2}{4}"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"),
        ("-\\frac{-1}{2}", "0.5"),
        ("$1,250.00", "1250"),
        ("50\\%", "50"),
        ("50%", "50"),
        ("5\\text{ cm}", "5"),
        ("5 cm^2", "5"),
        ("5cm", "5"),
        ("180^\\circ", "180"),
        ("180°", "180"),
        ("12 square feet.", "12"),
        ("\\text{Tuesday}", "tuesday"),
        ("\\left( 1 , 2 \\right)", "(1,2)"),
        ("x^2 - 4", "x^2-4"),
        ("2\\tfrac{1}{3}x", "2\\frac{1}{3}x"),
        ("0.1", "1/10"),
        ("12345678901234567890123/1", "12345678901234567890123"),
    ],
)
def test_equal_answers(a, b):
    assert equal(a, b) and equal(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("", ""),
        ("5", "6"),
        ("50%", "0.5"),
        ("0.3333333333333333", "1/3"),
        ("1/0", "2/0"),
        ("2 pi", "2"),
        ("2x", "2"),
        ("3 or 4", "3"),
        ("(1,2)", "(12)"),
        ("a", "A"),
        ("x^2-4", "x^2+4"),
        ("٣", "3"),
        ("1e3", "1000"),
        ("2\\frac{1}{3}", "21/3"),
        ("12345678901234567890123", "12345678901234567890124"),
    ],
)
def test_different_answers(a, b):
    assert not equal(a, b) and not equal(b, a)


def test_gold_is_where_a_solution_ends():
    assert gold("so 2 + 2 = 4.\n#### 1,234") == "1234"
    assert gold("first \\boxed{1}, then \\boxed{\\frac{a}{b}}") == "\\frac{a}{b}"
    assert gold(" Tuesday ") == "Tuesday"


def test_correct_takes_the_extracted_answer_or_the_whole_text():
    assert correct("<answer>\\frac{1}{2}</answer> 7", "0.5")
    assert correct("3*5+7", "3*5+7") and not correct("3*5+7", "22")
    assert not correct("", "") and not correct("5", "")


def test_no_text_takes_long_or_raises():
    tags = [
        "<answer>",
        "\\boxed{",
        "{",
        "}",
        "1,",
        "1,234",
        "####",
        "\\frac{1}{",
        "9",
        "-",
        "\\text{",
        "5 a",
        "\ud800",
    ]
    start = time.process_time()
    for tag in tags:
        for text in (tag * 30_000, "1" + tag * 30_000 + "7", tag * 3):
            assert isinstance(correct(text, "3"), bool)
            assert len(extract(text)) <= MAX_LENGTH
            normal(text[:1000])
    assert time.process_time() - start < 5
    assert rational("9" * 300) is None and rational("1" * 150) == int("1" * 150)
    assert not correct("9" * 100_000, "9" * 100_000)
