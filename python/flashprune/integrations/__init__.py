"""Where flashprune meets other libraries: adapters only, the arithmetic is in the package."""
