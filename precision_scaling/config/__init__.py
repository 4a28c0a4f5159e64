"""Options: their defaults, what each may be, the flags that set them, and the runs that they ask for."""
