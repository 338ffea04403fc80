"""Which operators MPS has in any torch: tables read from an installed torch, a wheel, or a nightly."""
