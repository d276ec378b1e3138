"""Studies: claims of the field as experiments with arms, seeds and a verdict by a rule that is fixed before."""
