"""FastAPI application: routes, exception handlers, middleware. Each endpoint has a module in api/."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..runtime.versions import VERSION
from .api import chat, tokens
from .api import completions as completions_api
from .api import seed as seed_api
from .errors import ApiError, from_http, from_validation
from .guard import AccessMiddleware
from .metrics import CONTENT_TYPE
from .middleware import RequestMiddleware
from .page import read_page
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, SeedRequest, TokenizeRequest
from .service import Service
from .sse import Json


def make_app(service: Service) -> FastAPI:
    """The ASGI application of one service. The server that runs it also starts the engine worker."""
    app = FastAPI(title="aquila_pd", version=VERSION, docs_url=None, redoc_url=None, default_response_class=Json)
    add_openai(app, service)
    add_others(app, service)
    add_errors(app)
    routes = frozenset(route.path for route in app.routes)
    app.add_middleware(AccessMiddleware, service=service)
    app.add_middleware(RequestMiddleware, service=service, routes=routes)  # added last: the outermost
    return app


def add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await chat.answer(service, asked, request)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await completions_api.answer(service, asked, request)

    def entry() -> dict:
        found = {"id": service.settings.name, "object": "model", "created": service.created, "owned_by": "aquila_pd"}
        return {**found, "max_model_len": service.engine.max_length}

    @app.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        service.require_model(model)
        return Json(entry())


def add_others(app: FastAPI, service: Service) -> None:
    page, page_headers = read_page()

    @app.get("/")
    async def chat_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=page_headers)

    @app.post("/")
    async def seed(asked: SeedRequest, request: Request) -> Response:
        return await seed_api.answer(service, asked, request)

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        return Json(await tokens.tokenize(service, asked))

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Response:
        return Json(await tokens.detokenize(service, asked))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return Json(tokens.tokenizer_info(service))

    @app.get("/health")
    async def health() -> Response:
        trouble = "The server is shutting down." if service.stopping else service.worker.trouble()
        if trouble:
            return Json({"status": "unhealthy", "reason": trouble}, 503)
        return Json({"status": "ok", "model": service.settings.name})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


def add_errors(app: FastAPI) -> None:
    def as_response(error: ApiError, request: Request) -> Response:
        request.state.record.outcome = request.state.record.outcome or error.code
        return Json(error.body(), error.status_code, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return as_response(from_http(error, request.method, request.url.path), request)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return as_response(from_validation(error), request)
