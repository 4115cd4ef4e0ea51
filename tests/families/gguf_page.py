"""A page of text in several scripts, with everything tokenizers trip over."""

PAGE = (
    "The quick brown fox doesn't jump; it's WE'LL I'Ve \"quoted\" — naïve café, Zürich, ﬁne, İstanbul "
    "ſ'ſ, O'Tm'T.\n"
    "camelCase HTTPServer iOS parseJSONFile snake_case_name ÉcoleNormale McDonald'S'll\n"
    "Съешь ещё этих мягких французских булок, да выпей чаю. ПриветМир!\n"
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· άλφα, βήτα;\n"
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ١٢٣٤٥ ﷽\n"
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם\n"
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण १२३४ क्षि\n"
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓\n"
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。「你好」　全角　空格１２３ abc你好def\n"
    "いろはにほへと ちりぬるを カタカナ ﾊﾝｶｸ です。\n"
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.\n"
    "👨\u200d👩\u200d👧\u200d👦 👍🏽 🇨🇭 ❤\ufe0f\u200d🔥 🧑🏿\u200d🚀 ☎\ufe0f 1\ufe0f\u20e3\n"
    "3.14159 1234567890 1e-10 0xDEADBEEF ½ ² Ⅷ 1,000,000.00 12 123 1234 12345 a1b22c333d4444\n"
    "def f(x):\n    if x > 0:\t# tab\n\t\treturn {\"a\": [1, 2,   3], 'b': x**2}   \n\n\n    else:  \n   "
    "     pass\n"
    "0       if seven:\n1             thirteen\n2               fifteen\n3\t\t\t\t\t\t\ttabs\n"
    "4 \t\u00a0\u2003\u3000\u2002 wide \t\u00a0\u2003\u3000\u2002 run \t\u00a0\u2003\u3000\u2002 twice\n"
    "windows\r\nline\r\n\r\nendings\r\n\ttabs\t\tand   multiple    spaces     here.   \n"
    "zero\u200bwidth\u200d and\u200c nbsp\u00a0\u00a0x em\u2003space "
    "line\u2028para\u2029next\u0085figure\u3000\u3000wide\n"
    "!!!???...---=== ((([[[{{{ <<<>>> ~~~ `code` $100 €5 ¥ §1 °C ± × ÷ ∑ ∞ → ⇒ ■ path/to/file //// \\\\ "
    "./\n/\n"
    "\ufffd\uffff𐍈𝔘𝔫𝔦 𒀀 🀄 \u202ertl\u202c e\u0301 é a\u0323\u0308 \x00\x01\x1c\x1f\x7f\n"
    "'s 's' ''s d't 've'll !letter .Word \nnewline ?\n\n!\r\r?\n \n\n  \n\t\n   z"
)
# Control tokens inside text, as a chat template puts them there.
CHAT = (
    "<|im_start|>user\nWhat's 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|><|endoftext|>  <|im_start|> x"
)
