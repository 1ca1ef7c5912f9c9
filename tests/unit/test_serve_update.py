"""Which updates leave the replicas that there are."""

from typing import Any

import pytest
from factories import plan, serve_model, serve_tree

from flagscale.runner.plan.service import ServicePlan, decode_service
from flagscale.serve.fleet import Post
from flagscale.serve.update import is_resize


def make_service(chips: int = 8, num_replicas: int = 2, **args: Any) -> ServicePlan:
    model = serve_model(engine_args={"model": "/m", **args}, resources={"num_replicas": num_replicas})
    job = plan(serve_tree(model, experiment__runner={"nproc_per_node": chips}))
    assert job.service is not None
    return decode_service(job.service)


def make_posts(service: ServicePlan, count: int) -> list[Post]:
    return [Post(service.models[0], seat, 1) for seat in range(count)]


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_another_number_alone_leaves_them(num_replicas: int) -> None:
    old = make_service()
    assert is_resize(old, make_service(num_replicas=num_replicas), make_posts(old, min(2, num_replicas)), 1, 1)


@pytest.mark.parametrize("changes", [{}, {"num_replicas": 3, "seed": 7}, {"num_replicas": 3, "served_model_name": "n"}])
def test_anything_else_replaces_them_and_so_does_asking_for_the_same_again(changes: dict[str, Any]) -> None:
    old = make_service()
    assert not is_resize(old, make_service(**changes), make_posts(old, 2), 1, 1)


def test_what_has_failed_or_sits_where_no_seat_is_any_more_is_replaced() -> None:
    old = make_service()
    posts = make_posts(old, 2)
    posts[1].enter("failed")
    assert not is_resize(old, make_service(num_replicas=3), posts, 1, 1)
    assert not is_resize(old, make_service(chips=1, num_replicas=1), [Post(old.models[0], 7, 1)], 1, 1)


@pytest.mark.parametrize(("new_threads", "is_left"), [(2, True), (1, False)])
def test_replicas_on_a_cpu_that_share_it_anew_are_replaced(new_threads: int, is_left: bool) -> None:
    old, new = (
        decode_service(service)
        for number in (1, 2)
        if (
            service := plan(
                serve_tree(serve_model(resources={"num_replicas": number}), experiment__runner={"device_type": "cpu"})
            ).service
        )
    )
    assert is_resize(old, new, make_posts(old, 1), 2, new_threads) is is_left
