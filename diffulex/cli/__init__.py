"""The command line. Nothing here is loaded by `import diffulex`; transformers is imported inside the commands."""
