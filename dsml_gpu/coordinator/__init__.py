"""The coordinator service: devices, communicators, groups and the control round that runs them."""
