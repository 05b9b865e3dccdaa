"""Weights in and out: names of other libraries, exports, and the classifier made from any of them."""
