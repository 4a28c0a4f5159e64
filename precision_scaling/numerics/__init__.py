"""Number formats and the arithmetic of rounding to them. Pure; knows no model."""
