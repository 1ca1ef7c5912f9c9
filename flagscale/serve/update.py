"""What an update of a service is: other replicas in place of all that there are, or only another number of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from flagscale.runner.plan.scaling import Scaling
from flagscale.runner.plan.service import ServicePlan
from flagscale.serve.fleet import Post
from flagscale.serve.replicas import bind_threads


@dataclass(slots=True)
class Update:
    """The last update that was asked for. version: the one that it leads to"""

    version: int
    state: Literal["running", "done", "failed"] = "running"
    message: str = ""


def is_resize(old: ServicePlan, new: ServicePlan, posts: Iterable[Post], old_threads: int, new_threads: int) -> bool:
    """Whether the replicas in `posts` are as `new` has them too, and only how many there are is to change.

    One that has failed for good is to be replaced.
    old_threads, new_threads: of a replica on this machine's CPU; more of them on the same cores want other ones
    """
    models = {model.name: model for model in new.models}
    kinds, new_kinds = (
        {replace(model, scaling=Scaling(), seats=()) for model in version.models} for version in (old, new)
    )
    if kinds != new_kinds or all(models[model.name].scaling == model.scaling for model in old.models):
        return False
    return all(
        post.state != "failed"
        and post.seat < len(seats := models[post.model.name].seats)
        and bind_threads(seats[post.seat].job, new_threads)
        == bind_threads(post.model.seats[post.seat].job, old_threads)
        for post in posts
    )
