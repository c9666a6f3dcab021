"""A live machine, safely: attach, arm, dispatch, disarm, restore."""
