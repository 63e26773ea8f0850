"""``python -m dsml_gpu`` is the command ``dsml-gpu``."""

from dsml_gpu.cli.main import main

main()
