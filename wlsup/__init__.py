"""wlsup: weak language supervision of pretrained vision encoders."""

__version__ = "0.1.0"
