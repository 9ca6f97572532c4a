// Follows the configuration of docs/clients.md, which makes `client`. Prints what a scenario gave as JSON.
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";

const model = "deepseek-flash";
const Color = z.object({ color: z.enum(["red", "blue"]) });
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { name: "weather", description: "Weather of a city", input_schema: city };
const color = { type: "object", properties: { color: { enum: ["red", "blue"] } }, required: ["color"] };
const paint = { name: "paint", input_schema: color };
const ask = (messages, options = {}) => client.messages.create({ model, max_tokens: 1000, messages, ...options });
const user = (content) => ({ role: "user", content });
const block = (answer, type) => answer.content.find((one) => one.type === type);
const shown = (answer) => ({
  text: block(answer, "text").text, reasoning: block(answer, "thinking")?.thinking,
  tokens: answer.usage.input_tokens + answer.usage.cache_read_input_tokens + answer.usage.output_tokens,
});

async function loop(messages) {
  for (;;) {
    const answer = await ask(messages, { tools: [weather], thinking: { type: "adaptive" } });
    messages.push({ role: "assistant", content: answer.content });
    const calls = answer.content.filter((one) => one.type === "tool_use");
    if (!calls.length) return block(answer, "text").text;
    messages.push(user(calls.map((call) => ({
      type: "tool_result", tool_use_id: call.id, content: `sun in ${call.input.city}`,
    }))));
  }
}

const scenarios = {
  async chat() {
    return shown(await ask([user("Hello")]));
  },
  async stream() {
    let text = "";
    const stream = client.messages.stream({ model, max_tokens: 1000, messages: [user("Hello")] });
    stream.on("text", (piece) => (text += piece));
    return { ...shown(await stream.finalMessage()), text };
  },
  async tools() {
    const messages = [user("Weather in Oslo?")];
    const text = await loop(messages);
    messages.push(user("And tomorrow?"));
    return { text, later: await loop(messages) };
  },
  async streamed_tools() {
    const tool = betaZodTool({
      name: "weather", description: "Weather of a city", inputSchema: z.object({ city: z.string() }),
      run: ({ city }) => `sun in ${city}`,
    });
    const runner = client.beta.messages.toolRunner({
      model, max_tokens: 1000, stream: true, messages: [user("Weather in Oslo?")], tools: [tool],
    });
    let last;
    for await (const stream of runner) last = await stream.finalMessage();
    return { text: block(last, "text").text };
  },
  async forced() {
    const given = [];
    for (const choice of [{ type: "any" }, { type: "tool", name: "paint" }]) {
      const call = block(await ask([user("A color")], { tools: [paint], tool_choice: choice }), "tool_use");
      given.push({ name: call.name, ...call.input });
    }
    return given;
  },
  async structured() {
    const answer = await client.messages.parse({
      model, max_tokens: 1000, messages: [user("A color")], output_config: { format: zodOutputFormat(Color) },
    });
    return [answer.parsed_output];
  },
  async refused() {
    const error = await client.messages.create({ model: "none", max_tokens: 9, messages: [user("Hi")] }).catch((e) => e);
    return { status: error.status, message: error.message };
  },
};
console.log(JSON.stringify(await scenarios[process.argv[2]]()));
