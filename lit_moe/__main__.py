"""``python -m lit_moe``: the same as the ``lit-moe`` command."""

import sys

from lit_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
