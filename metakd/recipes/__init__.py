"""Published methods as functions that return a configured balancer."""

from metakd.recipes.amal import amal
from metakd.recipes.auto_balance import auto_balance
from metakd.recipes.auto_lambda import auto_lambda
from metakd.recipes.bikd import bikd
from metakd.recipes.learning_to_reweight import learning_to_reweight
from metakd.recipes.meta_weight_net import meta_weight_net

__all__ = ["amal", "auto_balance", "auto_lambda", "bikd", "learning_to_reweight", "meta_weight_net"]
