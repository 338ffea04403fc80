"""suite=ops dtypes=true: which dtypes every operation takes, and what it makes of them."""
