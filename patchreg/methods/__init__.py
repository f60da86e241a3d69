"""One folder per method; `patchreg.registry` imports every one of them."""
