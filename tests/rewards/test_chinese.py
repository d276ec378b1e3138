"""Chinese answers: numbers in signs, units, bounds, ordinals, corrections and letters, read as a careful person reads them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from posttrain.rewards.chinese import chinese_number
from posttrain.rewards.extraction import extracted, flexible, strict
from posttrain.rewards.values import number_value

MARKED = [
    ("三十六", 36), ("负五", -5), ("二分之一", Fraction(1, 2)), ("三点五", Fraction(7, 2)), ("一点五倍", Fraction(3, 2)),
    ("三亿", 3 * 10**8), ("一半", Fraction(1, 2)), ("百分之五", 5), ("百分之三点五", Fraction(7, 2)), ("百分之50", 50),
    ("3分之1", Fraction(1, 3)), ("3又1/2", Fraction(7, 2)), ("3又2分之1", Fraction(7, 2)), ("三又二分之一", Fraction(7, 2)),
    ("负三又二分之一", Fraction(-7, 2)), ("两千三", 2300), ("一百二", 120), ("一百零二", 102), ("三万五", 35_000), ("3万5", 35_000),
    ("3万500", 30_500), ("三萬", 30_000), ("兩千", 2000), ("十二點五", Fraction(25, 2)), ("五億", 5 * 10**8), ("十万", 100_000),
    ("一万两千", 12_000), ("十二亿三千万", 1_230_000_000), ("一点五亿", 150_000_000), ("零", 0), ("二〇二四", 2024), ("五分钟", 5),
    ("负3", -3), ("三十六个苹果", 36),
    ("三个月", 3), ("12个苹果", 12), ("6，不是5", 6), ("42元", 42), ("42公里/小时", 42), ("5%", 5), ("x=5，成立", 5),
]  # fmt: skip
"""After the words for `the answer is`."""
UNMARKED = [
    ("因此，小明一共有25本书。", 25), ("共42人", 42), ("42℃", 42), ("5加3等于8", 8), ("7乘以8等于56", 56), ("答案不是5，而是6", 6),
    ("答案是5。不对，应该是6。", 6), ("答案是5。等等，是6。", 6), ("答案是5。错了，是6。", 6), ("x=3，y=4，所以x+y=7", 7), ("不超过5", 5),
    ("至少5", 5), ("小明有5元，小红有3元，共8元", 8), ("小于10的最大质数是7", 7), ("根号16等于4", 4), ("12的三分之一是4", 4),
]  # fmt: skip
NOTHING = [
    *(f"答案是{text}" for text in (
        "三成", "三四个", "十几个", "两个半", "三个半", "两点半", "二三十", "五千克", "三月", "二年级", "第5个", "2小时30分钟", "5元3角",
        "3点30分", "3月5日", "3比5", "3：5", "3、4或5", "3和4", "3与4", "3至5", "5以上", "5多", "50余个", "2个半", "2小时半", "8折",
        "5的平方", "正负3", "三个以上", "2的3次方", "根号5", "5加3", "5除以2",
    )),
    "一共是2小时30分", "3米5厘米", "日期是3月5日", "第5", "答案大于5", "x小于5", "结果不足5", "比5大", "如果答案是5，那么矛盾。",
    "假设答案是5。", "错误的答案是5", "错误答案：5", "答案是5。这是错误的。", "不等于5",
]  # fmt: skip
LETTERS = [
    ("故选：C", "C"), ("应选D。", "D"), ("A错误，B正确", "B"), ("A正确，B错误", "A"), ("A项正确，B项错误", "A"), ("A和B都不对，选C", "C"),
    ("不选A，选B", "B"), ("答案不是A，而是B", "B"), ("排除A和C，答案为B", "B"), ("选A，因为B太小", "A"), ("A。因为B不对", "A"),
    ("正确选项是B，A太小", "B"), ("答案为D，A、B、C均不正确", "D"), ("答案是A。不对，是B。", "B"), ("我在A和B之间犹豫，选B", "B"),
]  # fmt: skip
NO_LETTER = ["选A或B", "A、B、D", "答案是A、C", "答案是AC", "B选项错误", "不选A", "维生素C"]


@pytest.mark.parametrize(("text", "value"), MARKED)
def test_a_number_after_a_marker(text: str, value: int | Fraction) -> None:
    for found in (strict(f"答案是{text}"), flexible(f"答案是{text}")):
        assert number_value(found or "") == value


@pytest.mark.parametrize(("text", "value"), UNMARKED)
def test_the_last_number(text: str, value: int | Fraction) -> None:
    assert number_value(flexible(text) or "") == value
    assert strict(text) is None


@pytest.mark.parametrize("text", NOTHING)
def test_no_number(text: str) -> None:
    assert (strict(text), flexible(text)) == (None, None)


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_a_letter(text: str, letter: str) -> None:
    assert extracted(text, "flexible", "choice") == letter


@pytest.mark.parametrize("text", NO_LETTER)
def test_no_letter(text: str) -> None:
    assert extracted(text, "flexible", "choice") is None


@pytest.mark.parametrize("text", ["十十", "百", "二三", "三四十", "千万", "三万五万", "十两", "点五", "", "万一"])
def test_signs_in_no_order_of_a_number(text: str) -> None:
    assert chinese_number(text) is None
