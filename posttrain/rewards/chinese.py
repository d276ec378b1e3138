"""Read Chinese numbers in signs, and the words around digits that make them a part of something else.

Example:
    >>> [chinese_number(text) for text in ("一百零五", "三点五倍", "二分之一", "三四个")]
    ['105', '3.5', '1/2', None]
"""

from __future__ import annotations

import re

_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = (("亿", 10**8), ("万", 10**4), ("千", 1000), ("百", 100), ("十", 10))
_SIMPLIFIED = str.maketrans("負兩萬億點個幾餘來時號級與減強", "负两万亿点个几余来时号级与减强")
_SIGNS = "".join([*_DIGITS, *(sign for sign, _ in _UNITS)])
_NO_NOUN = "(?!分之|年级|[点半亿万成折几多余来比又到至或和与加减乘除的月号日时级" + _SIGNS + "])"
_NUMBER = re.compile(
    rf"(?P<sign>负?)(?:(?P<half>一半)|百分之(?P<percent>[{_SIGNS}]{{1,8}}(?:点[{_SIGNS}]{{1,8}})?)"
    rf"|(?:(?P<whole>[{_SIGNS}]{{1,16}})又)?(?P<below>[{_SIGNS}]{{1,12}})分之(?P<above>[{_SIGNS}]{{1,12}})"
    rf"|(?P<number>[{_SIGNS}]{{1,24}}?)(?:点(?P<decimals>[{''.join(_DIGITS)}]{{1,12}})(?P<scale>[万亿]?))?)"
    rf"(?P<noun>(?:{_NO_NOUN}[\u3400-\u9fff](?:(?![半以{_SIGNS}多几余比分又到至或和与加减乘除])[\u3400-\u9fff]){{0,3}})?)"
)
"""A number in signs and a noun of up to four signs, such as that of `three persons`; after other signs it is a part of something else."""
_KILO = "克米瓦卡帕焦赫字"
"""After the sign for thousand: five thousand grams, or five kilograms."""
_LARGER = "小时|个小时|时|天|年|个月|周|星期|分钟?|元|块|角|公里|千米|米|分米|公斤|千克|斤|吨|尺"
_SMALLER = "分钟?|秒钟?|小时|天|个月|角|毛|分|米|厘米|毫米|分米|克|两|寸"
LARGER_UNIT = f"(?:{_LARGER})[零又]?"
SMALLER_UNIT = f"(?:{_SMALLER})"
AFTER = (
    r"[加减減乘余餘多几幾半](?!仑|侖|法|号)|除以|[的之](?:平方|立方|阶乘|\d|一半|倒数|绝对值|相反数|[二三四五六七八九十百]分之|[二三四五六七八九十两]倍)"
    r"|次[方幂]|比\s?\d|\uff1a\d|分之|又|[点點](?![击评数])|月|[号號]|时(?!间)|年(?:级|\s?\d{1,2}月)|折|成(?![人员功为立])|来[个人元]|以[上下内]|之间"
    r"|(?:[个個天年米元块斤倍周]|小时|分钟|个小时)[半多]"
)
"""After a number: it is a part of an expression, a date or a time, an ordinal, or not exact."""
BEFORE = r"第\s?$|\d\s?(?:[加减減比]|乘以?|除以|[点點月]|\uff1a)\s?$|根号\s?$|比\s?$"
BOUND = r"(?<!不)(?:大于|小于|超过|不足|少于|多于|高于|低于|不到|介于)(?:或?等于)?\s?$"
"""Before a number: it is a part of an expression, an ordinal, or a bound."""
SPELLINGS = (
    (re.compile(r"正[负負]\s?(?=\d)"), "\u00b1"),
    (re.compile(r"[负負]\s?(?=\d)"), "-"),
    (re.compile(r"百分之(\d{1,15}(?:\.\d{1,15})?)"), r"\1%"),
    (re.compile(r"(?<=\d)又(\d{1,9})分之(\d{1,9})(?!\d)"), r" \2/\1"),
    (re.compile(r"(?<![\d.])(\d{1,9})分之(\d{1,9})(?!\d)"), r"\2/\1"),
    (re.compile(r"(?<=\d)又(?=\d{1,9}/\d)"), " "),
)
CORRECTION = r"(?<![\u3400-\u9fff])(?:等等|不(?=[\uff0c,\u3002]))|等一下|(?<!对)不对(?!称|等)|[算搞弄说]?错了|更正|纠正|抱歉|对不起"
SUPPOSED = (
    r"(?:如果|假如|假设|假定|倘若|若)[^\uff0c\u3002\uff1b,;\n]{0,12}答案(?:是|为|等于)[^\uff0c\u3002\uff1b,;\n]{1,60}"
)
NOT_THE_ANSWER = r"(?:错误|不正确|错)的?(?:答案|选项|结果)(?:是|为|\uff1a|:)[^\uff0c\u3002\uff1b,;\n]{1,60}"
REJECTED = (
    r"[^\u3002\uff01\uff1f\uff1b!?;\n]{1,60}[\u3002\uff01\uff1f\uff1b\uff0c,!?;]\s?(?:但是?|不过|然而)?(?:这|那|它|该答案)(?:个答案|个结果)?"
    r"(?:显然|明显)?(?:是)?(?:不对|不正确|错误|错)的?了?"
)


def chinese_number(text: str) -> str | None:
    """Return the digits of a text that is one number in Chinese signs, None if it is none, or not exact (three or four)."""
    found = _NUMBER.fullmatch(text.translate(_SIMPLIFIED))
    read = _read(found) if found else None
    return None if found is None or read is None else ("-" if found["sign"] else "") + read


def _read(found: re.Match[str]) -> str | None:
    if found["half"]:
        return "1/2"
    if found["percent"]:
        whole, _, decimals = found["percent"].partition("点")
        return _decimal("一百" if whole == "百" else whole, decimals, "%")
    if found["below"]:
        below, above = _whole(found["below"]), _whole(found["above"])
        whole_part = _whole(found["whole"]) if found["whole"] else 0
        if not below or above is None or whole_part is None:
            return None
        return f"{whole_part} {above}/{below}" if whole_part else f"{above}/{below}"
    if found["number"].endswith("千") and found["noun"][:1] in tuple(_KILO):
        return None
    return _decimal(found["number"], found["decimals"] or "", found["scale"] or "")


def _decimal(whole: str, decimals: str, end: str) -> str | None:
    value = _whole(whole)
    if value is None or any(sign not in _DIGITS for sign in decimals):
        return None
    digits = "".join(str(_DIGITS[sign]) for sign in decimals)
    return f"{value}{'.' * bool(digits)}{digits}{end}"


def _whole(text: str) -> int | None:
    """Return the value of a whole number. None if its signs are in no order of one, or name two neighbours (three, four)."""
    for sign, unit in _UNITS:
        head, found, tail = text.rpartition(sign) if unit > 1000 else text.partition(sign)
        if not found:
            continue
        above = 1 if unit == 10 and not head else _whole(head)
        below = _rest(tail, unit)
        if above is None or below is None or below >= unit or above >= (unit if unit > 1000 else 10):
            return None
        return above * unit + below
    digits = [_DIGITS[sign] for sign in text]
    if not digits or (len(digits) == 2 and 0 not in digits) or (len(digits) > 1 and "两" in text):
        return None
    return int("".join(map(str, digits)))


def _rest(text: str, unit: int) -> int | None:
    """Return the value of the signs after a unit; a single digit counts the next smaller unit, as in `a hundred two` for 120."""
    if not text:
        return 0
    if text[0] in "零〇":
        return _whole(text[1:])
    if len(text) == 1 and text in _DIGITS:
        return None if text == "两" else _DIGITS[text] * unit // 10
    return _whole(text)
