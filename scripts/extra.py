"""Print the requirements of an extra of pyproject.toml: `python scripts/extra.py test >test.txt`, for pip.

This installs an extra without rebuilding the native kernels. Without a C compiler reasoning-gym is left out: it needs
pycosat, which is distributed as C source only.
"""

import os
import shutil
import sys
import sysconfig
import tomllib

compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
has_compiler = shutil.which(compiler.split()[0]) is not None
with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]]
for name in wanted:
    if has_compiler or not name.startswith("reasoning-gym"):
        print(name)
