"""Apply the federated dashboard to a W&B project.

Same as ``polymodal dashboard --package fedcore``, for those who start from a script; needs ``polymodal[dashboards]``
and a W&B account.

    python dashboards/fedcore.py --entity my-team --project polymodal-fedcore
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # this folder, in which this file hides the package fedcore
    from polymodal.main import main

    sys.argv[1:1] = ["dashboard", "--package", "fedcore"]
    sys.exit(main())
