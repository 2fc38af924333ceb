"""One module per noun of OpenAI's API; each has a ``router``, and :data:`ROUTERS` lists them all.

A route parses, makes one call into ``workflows`` or ``serve``, and presents the result.
"""

from luthier.api.routes import (
    batches,
    chat,
    completions,
    embeddings,
    evals,
    files,
    fine_tuning,
    graders,
    models,
    responses,
    uploads,
    webhooks,
)

ROUTERS = (
    chat.router,
    completions.router,
    embeddings.router,
    responses.router,
    batches.router,
    files.router,
    uploads.router,
    fine_tuning.router,
    graders.router,
    evals.router,
    webhooks.router,
    models.router,
)
