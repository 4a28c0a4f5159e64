"""Values that a shell does something with, as data for the tests of the launch scripts."""

# What bash would compute with (and run what stands in it), were it not looked at before.
NUMBERS = ["a[$(touch hit)]", "$(touch hit)", "`touch hit`", "2;touch hit", "2\ntouch hit", "x=1", "PATH", "08", "0x10"]
NUMBERS += ["2#10", "1e3", "-1", "+1", "1+1", "1 2", " 2", "2 ", "two", "1.5", "1,2", "*", '"2"', "٣", "²", "-"]
NUMBERS += ["1000000001", "99999999999999999999"]

# What a shell would expand, split, or run.
TEXTS = ["$(touch hit)", "`touch hit`", "; touch hit", "&& touch hit", "| touch hit", "'; touch hit; '"]
TEXTS += ['"; touch hit; "', "$HOME", "${HOME}", "$((1+1))", "~", "~root", "*", "?", "[a]", "{a,b}", "!1", "#x", "&"]
TEXTS += [
    ">hit",
    "<(touch hit)",
    "it's",
    'a "quoted" word',
    "\\",
    "\\n",
    "$'\\n'",
    "a b",
    "  two  ",
    "é",
    "日本",
    "%s%n",
]
TEXTS += ["%", "%s%n", "-", "--", "-h", "--x", "=", "a=b=c", "^100k-|s1$", "(1, 2)", "", "0" * 5000]

# What ends a line, or changes a terminal.
BREAKS = ["a\nb", "a\n$(touch hit)", "a\r", "\t", "\x1b[2J", "\x7f", "\x08"]
