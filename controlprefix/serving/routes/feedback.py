"""The route of feedback: which of two texts a user prefers, kept to learn from."""

from fastapi import APIRouter
from pydantic import BaseModel

from controlprefix.serving.dependencies import ClientDependency, ServerDependency, TenantRoute
from controlprefix.serving.image_downloads import download_images
from controlprefix.serving.user_bodies import FeedbackBody

router = APIRouter(prefix="/v1/feedback", tags=["users"], route_class=TenantRoute)


class KeptFeedback(BaseModel):
    """How many preferences of a user are kept."""

    user: str
    num_kept: int


@router.post("", status_code=201)
async def keep_feedback(
    body: FeedbackBody, client: ClientDependency, server: ServerDependency
) -> KeptFeedback:
    """Keep which of two texts a user prefers, for `train_preferences`; nothing is trained now."""
    await download_images(body.messages or (), client, server)
    preference = body.preference()
    (num_kept,) = (
        await server.work_pools.run_with_store(client.cp.keep_feedback, [preference])
    ).values()
    return KeptFeedback(user=str(preference.user), num_kept=num_kept)
