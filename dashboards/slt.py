"""Apply the sign language translation dashboard to a W&B project.

Same as ``polymodal dashboard --package slt``, for those who start from a script; needs ``polymodal[dashboards]`` and a
W&B account.

    python dashboards/slt.py --entity my-team --project polymodal-slt
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, in which this file hides the package slt
    from polymodal.main import main

    sys.argv[1:1] = ["dashboard", "--package", "slt"]
    sys.exit(main())
