"""The calls for which the kernel is compiled and looked at: shape, layout and dtypes of x."""

BOTH = ("float32", "bfloat16")
CASES = [
    ("8x64x64x256", "last", BOTH),
    ("2x128x128x128", "last", BOTH),
    ("4x32x32x512", "last", BOTH),
    ("16x16x16x512", "last", BOTH),
    ("32x8x8x512", "last", BOTH),
    ("1x256x256x64", "last", BOTH),
    ("2x32x32x32x128", "last", BOTH),
    ("2x16x16x16x256", "last", BOTH),
    ("2x8x8x8x320", "last", BOTH),
    ("8x256x64x64", "first", BOTH),
    ("1x64x256x256", "first", BOTH),
    ("4x32x512x512", "first", ("bfloat16",)),
    ("32x64x28x28", "first", ("float32",)),
    ("16x512x14x14", "first", ("float32",)),
]
