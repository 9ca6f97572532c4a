"""Training tasks of the nano model: verifiable ones and small talk. TASKS maps a name to a task.

`TASKS[name].sample(seed, split)` returns an Example, the same for the same arguments; `.score(example, answer_text)`
returns 1.0 or 0.0 for the model's text after its thinking (for a tool call: the raw text with its DSML block).
"""

from dsv4.data.tasks.arithmetic import ARITHMETIC
from dsv4.data.tasks.base import Effort, Example, GymTask, Split, Task, split_of
from dsv4.data.tasks.chat import OpenQuestions
from dsv4.data.tasks.letters import LETTERS
from dsv4.data.tasks.lists import LISTS
from dsv4.data.tasks.mathematics import SchoolMathematics
from dsv4.data.tasks.structured import STRUCTURED, parse_tool_calls
from dsv4.data.tasks.talk import FollowUp, SmallTalk

_OTHERS = (SchoolMathematics, SmallTalk, OpenQuestions)
_SINGLE: list[Task] = [cls() for cls in (*ARITHMETIC, *LISTS, *LETTERS, *STRUCTURED, *_OTHERS)]
_CHAT: list[Task] = [task for task in _SINGLE if task.name != "tool_call" and not task.letterwise]
TASKS: dict[str, Task] = {task.name: task for task in (*_SINGLE, FollowUp(_CHAT))}

__all__ = ["TASKS", "Effort", "Example", "GymTask", "Split", "Task", "parse_tool_calls", "split_of"]
