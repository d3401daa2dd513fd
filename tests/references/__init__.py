"""Naive float64 twins, written from the papers' formulas element by element, with no code shared with qtemper."""
