"""The chat page with the real server and engine, over a model with scripted replies."""

from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect


def test_thinking_answer_stop_and_key(open_tab: Callable[[str], Any], serve: Any, model: Any) -> None:
    model.reply, model.seconds_per_step = "the mat</think>the **cat** sat on the mat and the cat", 0.08
    with serve(model, api_keys=["sk-1"]) as served:
        tab = open_tab(served.url + "/")
        field = tab.page.get_by_role("alert").get_by_label("API key")
        field.fill("sk-1")
        tab.page.keyboard.press("Enter")
        expect(tab.page.locator("#model")).to_have_text(served.engine.llm.name)
        tab.ask("hi")
        answer = tab.wait("done")
        assert answer.locator(".answer strong").inner_text() == "cat"
        expect(answer.locator("summary")).to_contain_text("Thought for")
        assert answer.locator(".thinking-body").text_content().strip() == "the mat"
        assert "tokens/s" in answer.locator(".stats").inner_text()
        answer.locator(".stats").press("Enter")
        details = answer.locator(".answer-details")
        expect(details).to_contain_text("(as deepseek-v4-flash)")
        assert details.locator("dt").all_inner_texts()[:3] == ["Model", "Prompt", "Answer"]

        model.reply, model.seconds_per_step = "</think>" + "cat " * 4000, 0.02
        tab.ask("count the cats")
        expect(tab.answer().locator(".answer")).to_contain_text("cat cat")
        served.wait_until_running()
        tab.page.get_by_role("button", name="Stop").click()
        tab.wait("stopped")
        served.wait_until_idle()  # the engine has dropped the request

        model.reply, model.seconds_per_step = "plain", 0.0
        tab.page.get_by_role("switch", name="DeepThink").click()
        tab.ask("again")
        tab.wait("done", 2)
        assert tab.text() == "plain" and tab.page.locator("details.thinking:visible").count() == 1


def test_errors_of_the_real_server(open_tab: Callable[[str], Any], serve: Any, model: Any) -> None:
    with serve(model, max_model_len=1024) as served:
        tab = open_tab(served.url + "/")
        tab.ask("cat " * 1200)
        failure = tab.wait("error").locator(".failure")
        expect(failure).to_contain_text("This message is too long for the model")
        expect(failure).to_contain_text("maximum context length is 1024 tokens")
        failure.get_by_role("button", name="New chat").click()
        model.fail = "out of luck"
        tab.ask("hi")
        failure = tab.wait("error").locator(".failure")
        expect(failure).to_contain_text("The model has stopped")
        expect(failure).to_contain_text("Out of luck.")
        tab.page.reload()  # a new page shows the error before any question
        expect(tab.page.get_by_role("alert").first).to_contain_text("Out of luck.")
