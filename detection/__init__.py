"""DEQDet and its relatives AdaMixer and RNNDet, built on `implicit`."""
