"""Base model and adapter."""

import logging

# PEFT imports bitsandbytes where it is installed, and that says which kernels it has not got.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
