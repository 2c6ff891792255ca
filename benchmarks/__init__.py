"""Measurements of fastlinear; nothing imports them."""
