"""The world a routing policy acts in: pool members and prices, recorded replies, environments, evaluation."""

from routers.catalogue import Member, cost, load_catalogue
from routers.table import Recorded, ReplyTable, load_table, quickstart_table

__all__ = ["Member", "Recorded", "ReplyTable", "cost", "load_catalogue", "load_table", "quickstart_table"]
