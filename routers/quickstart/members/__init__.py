"""The live members of the quickstart pool: five ways of using one small language model, run once and recorded."""

from routers.quickstart.members.agents import MEMBERS, MemberReply
from routers.quickstart.members.expression import ExpressionError, evaluate

__all__ = ["MEMBERS", "ExpressionError", "MemberReply", "evaluate"]
