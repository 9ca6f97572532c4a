"""Runs functions of programs: an object per line of stdin, its `value` or `error` per line of stdout.

`configuration`: text of a module that the program imports as such; `program`: its file; `function`: a name in it.
A process that serves several configurations imports a large client once.
"""

import json
import os
import runpy
import sys
import traceback
import types

answers = os.fdopen(os.dup(1), "w")  # whatever else prints goes to stderr
os.dup2(2, 1)
known = {}


def load(configuration, program):
    """Functions of the program with this configuration."""
    if (configuration, program) not in known:
        module = types.ModuleType("configuration")
        exec(configuration, module.__dict__)
        sys.modules["configuration"] = module
        known[configuration, program] = runpy.run_path(program)
    return known[configuration, program]


for line in sys.stdin:
    asked = json.loads(line)
    try:
        answer = {"value": load(asked["configuration"], asked["program"])[asked["function"]]()}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
