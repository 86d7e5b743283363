"""One call: from a set of parameters to plans, and from a plan to norms, coefficients and scaled gradients."""
