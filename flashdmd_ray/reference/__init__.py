"""Every setting of every job: explained, as a page, as a schema for editors, and written into a configuration that fits a machine."""
