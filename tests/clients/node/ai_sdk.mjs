// Follows a configuration of docs/clients.md, which makes `provider` and `model`. Prints what a scenario gave as JSON.
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false; // they go to the standard output

const Color = z.object({ color: z.enum(["red", "blue"]) });
const weather = tool({
  description: "Weather of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sun in ${city}`,
});
const paint = tool({ description: "Paints", inputSchema: Color });
const withTools = { model, tools: { weather }, stopWhen: stepCountIs(5) };
const user = (content) => ({ role: "user", content });

const scenarios = {
  async chat() {
    const answer = await generateText({ model, prompt: "Hello" });
    return { text: answer.text, reasoning: answer.reasoningText, tokens: answer.usage.totalTokens };
  },
  async stream() {
    const answer = streamText({ model, prompt: "Hello" });
    let text = "";
    for await (const piece of answer.textStream) text += piece;
    return { text, reasoning: await answer.reasoningText, tokens: (await answer.usage).totalTokens };
  },
  async tools() {
    const messages = [user("Weather in Oslo?")];
    const first = await generateText({ ...withTools, messages });
    messages.push(...first.response.messages, user("And tomorrow?"));
    const second = await generateText({ ...withTools, messages });
    return { text: first.text, later: second.text };
  },
  async streamed_tools() {
    const answer = streamText({ ...withTools, prompt: "Weather in Oslo?" });
    return { text: await answer.text };
  },
  async forced() {
    const given = [];
    for (const toolChoice of ["required", { type: "tool", toolName: "paint" }]) {
      const answer = await generateText({ model, prompt: "A color", tools: { paint }, toolChoice });
      given.push({ name: answer.toolCalls[0].toolName, ...answer.toolCalls[0].input });
    }
    return given;
  },
  async structured() {
    const options = { model, prompt: "A color", output: Output.object({ schema: Color }) };
    const streamed = streamText(options);
    for await (const _ of streamed.partialOutputStream);
    return [(await generateText(options)).output, await streamed.output];
  },
  async refused() {
    const error = await generateText({ model: provider("none"), prompt: "Hi" }).catch((e) => e);
    return { status: error.statusCode, message: error.message };
  },
};
console.log(JSON.stringify(await scenarios[process.argv[2]]()));
