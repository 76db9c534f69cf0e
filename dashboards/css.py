"""Apply the continual segmentation dashboard to a W&B project.

Same as ``polymodal dashboard --package css``, for those who start from a script; needs ``polymodal[dashboards]`` and a
W&B account.

    python dashboards/css.py --entity my-team --project polymodal-css
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, in which this file hides the package css
    from polymodal.main import main

    sys.argv[1:1] = ["dashboard", "--package", "css"]
    sys.exit(main())
