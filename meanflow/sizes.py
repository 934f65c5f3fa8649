"""Sizes of the official networks: depth, width, heads."""

DIT_SIZES = {  # METHOD: DiT, Peebles & Xie, Table 1; M is MeanFlow's own
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
DIT_PATCHES = (2, 4, 8)

IMF_SIZES = {  # improved MeanFlow's, all with two heads of IMF_HEAD_DEPTH blocks and patches of 2
    "B": (12, 768, 12),
    "M": (24, 768, 12),
    "L": (32, 1024, 16),
    "XL": (48, 1024, 16),
}
IMF_HEAD_DEPTH = 8
