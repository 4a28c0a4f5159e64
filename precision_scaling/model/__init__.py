"""The decoder, its sizes, and its rotary embedding."""
