"""Print the requirements of an extra of pyproject.toml: `python scripts/extra.py test | pip install -r /dev/stdin`.

So an extra is installed without building the native kernels again. Where no C compiler is, reasoning-gym is left out:
it needs pycosat, which comes as C alone.
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
