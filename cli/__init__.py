"""moegate: whether a Mixture-of-Experts layer still computes the right thing, the right way, as fast as before."""

__version__ = "0.1.0"
