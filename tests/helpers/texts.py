"""Strings of every kind that a tokenizer meets, seeded."""

from __future__ import annotations

import numpy as np

WORDS = (
    "the", "lighthouse", "keeper", "I'm", "don't", "WE'LL", "they'RE", "o'clock", "Straße", "naïve", "ﬁne",
    "Ångström", "привет", "мир", "Ελληνικά", "שלום", "مرحبا", "हिन्दी", "ไทย", "한국어", "日本語", "中文字符",
    "漢字かな", "𠮷野家", "x̂", "e\u0301", "A\u030a", "ñ", "n\u0303", "Zürich", "İstanbul", "ǅ", "ſ", "ʼn",
)  # fmt: skip
NUMBERS = (
    "0",
    "7",
    "42",
    "3.14159",
    "1,000,000",
    "007",
    "1e-9",
    "²³",
    "Ⅻ",
    "½",
    "٣٤",
    "１２",
    "0x1F",
    "2026-11-21",
)
SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u2009",
    "\x0b",
    "\u0085",
    "\u200b",
    "\ufeff",
)
SIGNS = (
    "!", "...", "?!", "—", "“quoted”", "(a)", "[b]", "{c}", "<d>", "#", "//", "/* */", "&&", "->", "=>", "::",
    "€", "№", "™", "'", "''", "'s", "' s", "\\n", "\x00", "\x1b[0m", "\x7f", "\u00ad", "\ufffd", "\U0010ffff",
)  # fmt: skip
EMOJI = ("🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷", "❤️", "☃", "e\u0301\u0323", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘")
CODE = (
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n",
    "SELECT * FROM t WHERE a='b';", "<div class=\"x\">\n  &nbsp;</div>", "if __name__ == '__main__':", "λx.x",
    "\\frac{\\partial f}{\\partial x}", "camelCaseHTTPServer2", "snake_case_name_1", "https://example.org/?q=%20",
)  # fmt: skip
FIXED = (
    "",
    " ",
    "\n",
    "a",
    "'",
    "\x00",
    "\u0301",
    "\U0001f600",
    " a",
    "a ",
    "\t\t",
    "  \n  \n",
    "don't",
    "'S",
    "1234567890",
)


def varied_texts(count: int, *, seed: int = 0, control: tuple[str, ...] = ()) -> list[str]:
    """`count` different strings, the fixed ones first.

    Args:
        count: how many.
        seed: of the rest.
        control: text of control tokens, to be mixed in whole and in part.
    """
    random = np.random.Generator(np.random.Philox(seed))
    marks = (*control, *(token[:-1] for token in control), *(token[1:] for token in control)) or ("<|x|>",)
    kinds = (WORDS, NUMBERS, SPACES, SIGNS, EMOJI, CODE, marks)
    texts = dict.fromkeys(FIXED)
    while len(texts) < count:
        pieces = []
        for _ in range(random.integers(1, 12)):
            kind = kinds[random.choice(len(kinds), p=(0.3, 0.13, 0.22, 0.13, 0.07, 0.07, 0.08))]
            pieces.append(kind[random.integers(len(kind))])
            pieces.append(("", " ")[random.integers(2)])
        if random.random() < 0.1:
            points = random.choice(_POINTS, size=random.integers(1, 20))
            pieces.append("".join(map(chr, points.tolist())))
        texts["".join(pieces)] = None
    return list(texts)[:count]


# Every code point but the surrogates and the planes without any assigned character (4 to 13); the basic
# plane more often than the rest together.
_BASIC = np.concatenate([np.arange(1, 0xD800), np.arange(0xE000, 0x10000)])
_POINTS = np.concatenate([np.tile(_BASIC, 8), np.arange(0x10000, 0x40000), np.arange(0xE0000, 0x110000)])
