// Renders the description of the interface. The key that somebody enters stays in the page.

/* global SwaggerUIBundle */
SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#reference",
  deepLinking: true,
  // Nothing is sent to a validator elsewhere.
  validatorUrl: null,
});
