"""Apply the sign language translation dashboard to a W&B project.

Same as ``polymodal dashboard --package slt``, for those who start from a script; needs ``polymodal[dashboards]`` and a
W&B account.

    python dashboards/slt.py --entity my-team --project polymodal-slt
"""

import argparse
import sys

from polymodal.dashboards import apply_layout, layout_for
from polymodal.errors import UserError


def main() -> int:
    """Parse the options, apply the layout, print its address."""
    parser = argparse.ArgumentParser(description="Apply the sign language translation dashboard to a W&B project.")
    parser.add_argument("--entity", default=None, help="W&B team or user (default: the account's)")
    parser.add_argument("--project", default="polymodal-slt", help="W&B project")
    parser.add_argument("--name", default="polymodal slt", help="name of the view")
    options = parser.parse_args()
    try:
        sys.stdout.write(apply_layout(layout_for("slt"), options.project, options.entity, options.name) + "\n")
    except UserError as error:
        sys.stderr.write(f"dashboards/slt.py: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
