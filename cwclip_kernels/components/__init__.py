"""Names to components: which parameters, or slices of them, are clipped together. No device is touched here."""
