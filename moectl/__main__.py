"""Makes `python -m moectl` work, and `accelerate launch moectl`, which runs this folder."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Run as a folder, this package's own modules would hide others of the same name.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE]
if str(_HERE.parent) not in sys.path:
    sys.path.insert(0, str(_HERE.parent))

from moectl.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
